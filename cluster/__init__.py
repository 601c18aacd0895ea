"""Where it runs: jobs on Ray clusters, manifests, checks of a machine. Nothing below imports it."""
