"""What stands on the user's module: quantizers, the forwards that bind them, and the plan."""
