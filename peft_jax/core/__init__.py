"""What all other parts build on: parameter trees, peft's matching rules, kernels' axes, checks, files."""
