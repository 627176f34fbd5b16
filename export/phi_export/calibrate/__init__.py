"""Calibration: Hessians, sensitivity and equalisation, measured on a text."""
