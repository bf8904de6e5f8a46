"""What all tests share: no network, no timing limits, two threads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("veneer", deadline=None)  # two shared cores: a slow example says nothing
settings.load_profile("veneer")
