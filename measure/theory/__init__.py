"""What the diagnostics rest on, verified numerically."""
