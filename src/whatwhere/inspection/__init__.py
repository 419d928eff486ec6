"""What a network looks at and looks for, and what it does when the picture changes."""
