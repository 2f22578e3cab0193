"""Chats: messages, templates, and which token belongs to which role."""
