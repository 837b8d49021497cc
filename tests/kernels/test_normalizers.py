"""The definitions in kernels/normalizers.py, each against another way to compute it, in float64."""
