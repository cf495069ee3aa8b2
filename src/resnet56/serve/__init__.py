"""Serve a network: an HTTP API, its description, and a page to try it on.

limits.py     how much of anything a client may ask for
uploads.py    pictures out of a request's body
decoding.py   uploads to pixels, in processes with a deadline and a memory limit
decode_worker.py  such a process
batching.py   requests that come together go through the network together
schema.py     what the API says, as types
meter.py      what is counted, for Prometheus
front.py      what every answer goes through: headers, counting, the last resort
app.py        the API itself
docs.py       its description as a page that needs nothing from elsewhere
server.py     a port, signals, connections that never finish
index.html.j2, docs.html.j2, page.css, page.js
"""
