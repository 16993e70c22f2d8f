"""What one page, one visit and one request may take. The figures of `docs/page.md` are these."""

from __future__ import annotations

MAX_PROMPT = 2000  # characters of a prompt, an instruction, a question or a message
MAX_COUNT = 16  # pictures of one order
MAX_TRIES = 8  # times that a picture is drawn (best_of)
MAX_ORDERS = 32  # orders that run or wait at the same time
MAX_AREA = 2048 * 2048  # pixels of a drawn picture
MAX_VISITS = 64  # visits whose pictures and conversations are kept
VISIT_SECONDS = 6 * 3600.0  # a visit that was quiet for so long is forgotten
MAX_HISTORY = 48  # pictures of a visit; more than MAX_COUNT, so that an order never loses its own
MAX_MESSAGES = 200  # messages of a conversation that are shown
MAX_UPLOAD_BYTES = 20 << 20
MAX_UPLOAD_PIXELS = 25_000_000  # decoded, 75 MB
MAX_DECODERS = 2  # uploads that are decoded at the same time
KEPT_SIDE = 1024  # pixels; a given picture is made smaller than this before it is kept
MAX_BODY_BYTES = 128 << 10  # of a request that is no upload
MAX_CACHE_BYTES = 1 << 30  # uploads and shown pictures on the disk
UNREAD_SECONDS = 15.0  # an order whose answer nobody has begun to read is stopped after so long
STATUS_SECONDS = 0.25  # between two reports of steps
THREADS = 3 * MAX_ORDERS  # each order holds one, and buttons must still be answered
