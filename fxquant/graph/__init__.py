"""Reading and editing an FX graph: nodes, operator kinds, frames, bodies, what moves and what depends on what."""
