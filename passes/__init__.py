"""Graph passes, one to a file; installed as ``fxquant.passes`` and imported only under that name."""
