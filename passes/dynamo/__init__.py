"""Passes on what Dynamo or torch.export wrote, before it is captured."""
