"""HTTP server for a model: a prediction API, its reference page, and a demo page.

limits.py         limits on requests, images and decoding
uploads.py        reads the images of a request body
decoding.py       decodes uploads in subprocesses with a deadline and a memory limit
decode_worker.py  the program that these subprocesses run
batching.py       groups concurrent requests into batches
schema.py         request and response types
meter.py          Prometheus metrics
middleware.py     host and cross-site checks, response headers, and request metrics
service.py        handles a prediction request from the upload to the response
app.py            the FastAPI application
docs.py           prepares the OpenAPI description for the reference page
server.py         listening socket, signals, and stalled connections

index.html.j2, docs.html.j2, page.css, page.js
"""
