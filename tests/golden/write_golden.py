"""Write the golden file of the present protocol version: `python -m tests.golden.write_golden`. Only after PROTOCOL_VERSION was raised."""

import json
from pathlib import Path

from protocol.codec import encode
from protocol.messages import MESSAGES, PROTOCOL_VERSION
from tests.protocol.examples import example

RUN = 0x0123456789ABCDEF

if __name__ == "__main__":
    golden = {tag: [bytes(frame).hex() for frame in encode(example(tag), RUN)] for tag in sorted(MESSAGES)}
    path = Path(__file__).parent / f"messages-v{PROTOCOL_VERSION}.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")
