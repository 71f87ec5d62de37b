"""Passes on AOTAutograd's joint graph of forward and backward."""
