"""What the build makes of protos/mer/v1: messages (`inference_pb2`) and stubs (`inference_pb2_grpc`)."""
