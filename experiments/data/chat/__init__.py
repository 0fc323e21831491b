"""Chats: a checkpoint's template renders them, in a sandbox with limits."""
