"""Learning on the device: what training takes in memory, and ways to make it take less.

`memory` counts, `saving` makes the savings that autograd does not make by itself, `methods` chooses what trains.
"""
