"""The faces of the engine: HTTP, gRPC, metrics. No logic of their own."""
