"""Which objective trains better at the same cost, measured: runs, noise, data, text."""
