"""From a conversation to the exact prompt: formats, prompt defenses, and untrusted text that stays data."""
