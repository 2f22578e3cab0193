"""Corpora as people have them: finding the files, reading their records, turning a record into tokens and rows.

`sources` finds and identifies files, here or at any fsspec URL; `formats` reads their records in pieces. `encode` makes
tokens of texts and token ids, `chats` of messages; `documents` cuts what they give into contexts and rows. `recipe` is
the whole way, as a value.
"""
