"""One IR for all passes: a Dynamo graph, or a module under torch.export, as an ATen training graph."""
