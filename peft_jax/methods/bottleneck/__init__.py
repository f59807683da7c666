"""Bottleneck adapters: Houlsby, Pfeiffer, parallel, Compacter."""
