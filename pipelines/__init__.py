"""The work: archives, training, forecasting and scoring on Ray and xarray."""
