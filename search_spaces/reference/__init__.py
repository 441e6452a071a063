"""Reference networks: published designs by name, composed from shared blocks.

`base` holds what a reference network is, `registry` finds one by name. The designs are rows of tables that need no
torch (`*_designs.py`); the modules that build them (`blocks.py` and the network files) import it and are loaded on
first use.
"""

from search_spaces.reference.base import Design, ReferenceNetwork
from search_spaces.reference.registry import reference_network, reference_networks

__all__ = ["Design", "ReferenceNetwork", "reference_network", "reference_networks"]
