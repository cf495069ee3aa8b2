"""Five seconds of load: every request gets the answer it deserves, beside hostile ones."""

import asyncio

from serve_fixtures import server
from serve_load import main


def test_under_load_every_request_gets_the_answer_it_deserves() -> None:
    with server(decode_seconds=1.0) as (_, address):
        assert asyncio.run(main(address, clients=16, seconds=5, hostile=0.1)) == 0
