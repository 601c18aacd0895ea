"""The work: archives, training, forecasting and scoring on Ray and xarray."""

__version__ = "0.1.0"
