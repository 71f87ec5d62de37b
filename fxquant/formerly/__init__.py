"""Module names of version 0.1: `fxquant` looks for its submodules here too, so `fxquant.state` is `state.py`."""
