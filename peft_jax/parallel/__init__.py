"""Devices as a mesh, where each leaf lies on it, several processes."""
