"""Three seconds of load with hostile requests: every response has an expected status."""

import asyncio

from serve_fixtures import server
from serve_load import main


def test_every_response_under_load_has_an_expected_status() -> None:
    with server(decode_seconds=1.0) as (_, address):
        assert asyncio.run(main(address, clients=16, seconds=3, hostile=0.1)) == 0
