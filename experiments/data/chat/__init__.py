"""Chats: what a checkpoint's template makes of them, in a sandbox with limits."""
