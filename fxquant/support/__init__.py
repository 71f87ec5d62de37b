"""What every room may use and that knows nothing of quantization: tables, progress, optional packages, the digest."""
