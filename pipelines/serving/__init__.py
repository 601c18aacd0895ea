"""The on-demand service: forecasts over HTTP, on Ray Serve."""
