"""Elements, units, spectral grids and line shapes."""
