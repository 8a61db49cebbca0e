"""What a GPU that stopped working leaves behind: memory that its driver can no longer free.

Freeing it throws where nothing can catch, and so ends the process by a signal. It is kept instead, and the command ends
without the interpreter's tidying up.
"""

from __future__ import annotations

kept: list[object] = []
"""Empty as long as every device works."""
