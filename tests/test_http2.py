"""Many requests on one HTTP/2 connection: what is wrong with one is not the others' matter."""

from __future__ import annotations

import json
import socket
from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import pytest
from engine_models import write_text_model
from http_server import PATIENCE, serving

PATH = "/v1/completions"


class Client:
    """Frames as they are told, so that a body can come later than its answer."""

    def __init__(self, port):
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.status = {}
        self.body = defaultdict(bytes)
        self.ended = set()
        self.http.initiate_connection()
        self.send()

    def send(self):
        self.socket.sendall(self.http.data_to_send())

    def post(self, path=PATH, **headers):
        """Only the headers; returns the stream."""
        stream = self.http.get_next_available_stream_id()
        told = {":method": "POST", ":path": path, ":scheme": "http", ":authority": "127.0.0.1"}
        told |= {"content-type": "application/json"} | headers
        self.http.send_headers(stream, list(told.items()))
        self.send()
        return stream

    def data(self, stream, contents, end=True):
        self.http.send_data(stream, contents, end_stream=end)
        self.send()

    def read_until(self, done):
        while not done():
            data = self.socket.recv(1 << 16)
            assert data, "the connection was closed"
            for event in self.http.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    self.status[event.stream_id] = dict(event.headers)[":status"]
                elif isinstance(event, h2.events.DataReceived):
                    self.body[event.stream_id] += event.data
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
                assert not isinstance(event, h2.events.ConnectionTerminated)
            self.send()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("http2")
    keys = path / "keys"
    keys.write_text("me secret\n")
    model = write_text_model(path / "small", max_position_embeddings=1 << 17)
    with serving(model, "--api-key-file", keys) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (PATH, {"authorization": "Bearer wrong"}, "401"),
        ("/v1/nothing", {"authorization": "Bearer secret"}, "404"),
        (PATH, {"authorization": "Bearer secret", "content-length": str(1 << 40)}, "413"),
    ],
)
def test_the_body_of_a_refused_request_ends_no_other(server, path, headers, status):
    client = Client(server.port)
    with client.socket:
        endless = client.post(authorization="Bearer secret")
        asked = {"prompt": "The", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
        client.data(endless, json.dumps(asked).encode())
        client.read_until(lambda: client.body[endless])
        refused = client.post(path, **headers)
        client.read_until(lambda: refused in client.ended)
        assert client.status[refused] == status
        for _ in range(3):
            client.data(refused, b"x" * 1000, end=False)
        client.read_until(lambda: endless in client.ended)
        assert client.body[endless].endswith(b"data: [DONE]\n\n")
        again = client.post(authorization="Bearer secret")
        client.data(again, json.dumps(asked | {"stream": False, "max_tokens": 2}).encode())
        client.read_until(lambda: again in client.ended)
        assert client.status[again] == "200"
