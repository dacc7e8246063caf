package render

import "fmt"

// What compare prints.
const (
	ImagesIdentical    = "Images are identical.\n"
	StrictSizeMismatch = "Strict mode: Image size mismatch!\n"
	SizeMismatch       = "Warning: Image size mismatch!\n"
)

// ContentMismatch is compare's verdict on images that differ first at a guest
// offset.
func ContentMismatch(offset int64) string {
	return fmt.Sprintf("Content mismatch at offset %d!\n", offset)
}

// StatusMismatch is the verdict of compare -s where one image allocates what
// the other does not.
func StatusMismatch(offset int64) string {
	return fmt.Sprintf("Strict mode: Offset %d block status mismatch!\n", offset)
}
