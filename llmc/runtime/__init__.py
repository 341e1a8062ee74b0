"""The runtime, copied verbatim into every package; imports nothing of llmc outside itself."""
