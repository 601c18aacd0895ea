"""What is to be known of Ray clusters without Ray, whose import takes a second."""

import socket

from pipelines.errors import InputError

KNOCK_SECONDS = 10.0
NODE_GROUP = "ray.io/node-group"
"""Label of a node that KubeRay or an autoscaler made."""


def knock(place: str) -> None:
    """Find out soon that no head node listens, which Ray would ask for minutes.

    Raises:
        InputError: nobody does.
    """
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if "://" not in host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
        except OSError as error:
            raise InputError(f"nobody listens at {place}: needed the address of a Ray cluster") from error
