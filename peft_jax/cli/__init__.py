"""What the modes of ``run.py`` do with a configuration: it prints, and it knows the workdir."""
