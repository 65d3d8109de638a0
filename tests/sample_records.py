"""One conversation in the words of every format, and the files of the libraries that own them."""

import io
import json

from PIL import Image

CAT, DOG = "cat.png", "dog.png"


def png(value):
    content = io.BytesIO()
    Image.new("L", (5, 3), value).save(content, "png")
    return content.getvalue()


PIXELS = {CAT: png(40), DOG: png(200)}


def said(messages):
    """Roles and contents of messages; media as their bytes."""
    return [
        (message.role, [part if isinstance(part, str) else part.read() for part in message.content])
        for message in messages
    ]


def write_images(folder):
    for name, content in PIXELS.items():
        (folder / name).write_bytes(content)


def llava(*turns, **fields):
    roles = ("human", "gpt")
    conversation = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    return {**fields, "conversations": conversation}


def messages(*turns, **fields):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)], **fields}


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_array(file, records, **options):
    file.write_text(json.dumps(records, **options), encoding="utf-8")
    return file
