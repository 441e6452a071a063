"""What `nasbench.plan` makes of the sections of a configuration, a module per kind of section.

Each completes its section with defaults, full names and absolute paths, and refuses what makes no sense.
"""
