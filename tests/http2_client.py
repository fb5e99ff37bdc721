"""HTTP/2 frame by frame, for what well-behaved clients don't do."""

from __future__ import annotations

import socket
from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import h2.settings
from http_server import PATIENCE

PATH = "/v1/completions"


class Client:
    """Frames as they are told, so that a body can come later than its answer.

    window: how many bytes of each answer are taken; None: all of them.
    """

    def __init__(self, port, window=None):
        config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
        self.http = h2.connection.H2Connection(config)
        self.takes_all = window is None
        if window is not None:
            initial = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            self.http.local_settings = h2.settings.Settings(client=True, initial_values=initial)
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.status = {}
        self.body = defaultdict(bytes)
        self.ended = set()
        self.http.initiate_connection()
        self.send()

    def send(self):
        self.socket.sendall(self.http.data_to_send())

    def ask(self, method="POST", path=PATH, end=False, **headers):
        """Only the headers; returns the stream."""
        stream = self.http.get_next_available_stream_id()
        told = {":method": method, ":path": path, ":scheme": "http", ":authority": "127.0.0.1"}
        told |= {"content-type": "application/json"} | headers
        given = [each for each in told.items() if each[1] is not None]
        given.sort(key=lambda each: not each[0].startswith(":"))
        self.http.send_headers(stream, given, end)
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
                    if self.takes_all:
                        self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
                assert not isinstance(event, h2.events.ConnectionTerminated)
            self.send()

    def answer(self, stream):
        """Its status and body, when it is complete."""
        self.read_until(lambda: stream in self.ended)
        return self.status[stream], self.body[stream]
