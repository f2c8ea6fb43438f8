"""Spectra from quantum chemistry: vibrations by GFN2-xTB, excitations by TD-B3LYP."""
