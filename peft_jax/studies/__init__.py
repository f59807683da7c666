"""Many runs: their records, what they say together, tables, plots and the HTML page."""
