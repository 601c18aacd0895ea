"""Tests of the service; a package, so that its fixtures end with it."""
