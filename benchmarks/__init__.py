"""What torch_curvature costs, beside its peers, plain torch and the floor of the machine: ``python -m benchmarks``."""
