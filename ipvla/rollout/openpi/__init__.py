"""The openpi websocket protocol, both ways: others ask our policies, our simulators ask others' policies."""
