"""posattn inside other libraries. Nothing here is imported by posattn itself."""
