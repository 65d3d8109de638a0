"""An audio tower of Whisper, a function that reads sound for it, and rows that name recordings and pictures."""

from __future__ import annotations

import json
import wave

import numpy as np
import torch
import transformers
from own_data import make_folder

FRAMES, BINS = 22, 6
ROWS = 13
READER = f"""
import io
import wave

import numpy as np
import torch

from torchfuse.data import MediaInput


def spectrogram(media):
    with wave.open(io.BytesIO(media.read())) as sound:
        levels = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 2**15
    options = {{"window": torch.hann_window({2 * BINS - 2}), "return_complex": True}}
    spectrum = torch.stft(torch.tensor(levels).float(), {2 * BINS - 2}, 7, **options)
    return MediaInput(torch.log1p(spectrum.abs())[None, :, :{FRAMES}], keyword="input_features")
"""
WHISPER = {
    "vocab_size": 40,
    "d_model": 12,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 17,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 8,
    "num_mel_bins": BINS,
    "max_source_positions": FRAMES // 2,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def write_tone(file, number):
    levels = 2e4 * np.sin(np.arange(200) * (0.1 + 0.07 * number))
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(1000)
        sound.writeframes(levels.astype("<i2").tobytes())


def row(number, images=0):
    """A conversation with one recording, two, or none, and with some images in front of them."""
    names = [f"{number}.wav", f"{number + 1}.wav"][: number % 3]
    pictures = [f"pictures/{4 * n}.png" for n in range(images)]
    parts = [{"type": "image"} for _ in pictures] + [{"type": "audio"} for _ in names]
    text = f"Number {number}?"
    content = [*parts, {"type": "text", "text": text}]
    if number % 2:
        content = "".join(f"<{part['type']}>" for part in parts) + text
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": f"It is {number}."},
    ]
    return {"messages": messages, "audio": names, "images": pictures}


def make_audio_folder(folder):
    """Write what ``own_data`` has, a directory of an audio tower, and files of rows."""
    folder = make_folder(folder)
    (folder / "sound_reading.py").write_text(READER)
    for number in range(ROWS + 1):
        write_tone(folder / f"{number}.wav", number)
    for name, images in (("rows", lambda n: 0), ("both", lambda n: n % 4 % 3)):
        rows = [row(number, images(number)) for number in range(ROWS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    torch.manual_seed(7)
    whisper = transformers.WhisperModel(transformers.WhisperConfig(**WHISPER))
    whisper.save_pretrained(folder / "whisper")
    # In a file with the name of an image processor's.
    transformers.WhisperFeatureExtractor(BINS).save_pretrained(folder / "whisper")
    return folder
