"""The gRPC API: protos/mer/v1/inference.proto, served by grpc.aio."""
