// Package forward moves frames from one vif to another in the same process, as routers,
// firewalls and bridges do.
//
// [Join] connects two vifs back to back. For other shapes, a [Sender] is the sending side
// of one vif, shared by as many receivers as there are: each has an [Input], with a queue of
// its own, so that one who sends more than the vif takes fills only that queue. [Receive] is
// the receiving side of one vif. Package barevif/pvnet/bridge is made of these.
//
// # What happens to a frame
//
// A frame is not copied on its way through this package, but for a lent one that has to wait (see
// below): it stays in the page into which its device received it, until the sending device has
// copied it into a page of its peer (a backend), or into one that its peer has a grant for (a
// frontend). Its checksum state and its GSO stay as they are. If the peer of the
// sending device does not take partial checksums or long frames, the device completes the
// checksum or cuts the frame ([pvnet.TX.Send]).
//
// The goroutine that gives frames to an Input sends them itself while no other does: a batch
// then takes one lock more than [pvnet.TX.Send] does, once before and once after it. While
// another goroutine sends, the frames wait in the input's queue, and go with the next batch. A
// goroutine for each queue of the vif takes over when the vif has no room, or when one caller
// has sent for others long enough. Frames of a flow stay in order: those that one goroutine
// gives to an Input are sent in that order as far as they take the same queue of the vif, and
// [pvnet.Device.QueueOf] chooses that by the flow.
//
// # Fairness
//
// Inputs that have frames waiting take turns by bytes (deficit round robin): whatever an
// input sends, and in frames of whatever size, each of the others gets the same share of the
// vif. Which input's frames are refused when queues are full depends on that input alone
// ([Policy]).
//
// # What may wait
//
// Frames that wait hold pages of the device that received them, so they are bounded twice:
// in each queue by [Config].Frames, and for each [Source] by its number of pages, over all
// Senders. As a source's pages get scarce, each queue may hold fewer of them: at most as
// many as are still free. So a source that sends to vifs which take nothing still reaches
// the others, and its device still has pages to receive with.
//
// A backend that lends its guest's pages ([pvnet.Config].LendRx) saves a copy, but answers that
// guest in order: if a frame waited in such a page, the guest would wait for the pages of all frames
// behind it. So a lent frame that has to wait is copied first, and is dropped as Full if its source
// has no page for it; one that finds room is never copied. With [Wait], which is for two vifs that
// are to wait for each other, it is not copied, and waits in the guest's page. A guest can still write
// to a page that it lends. So leave LendRx off where a program first checks the bytes of a frame and
// then passes the frame on, as a filter does: the guest could change the bytes in between.
//
// Pages come back when a vif ends, whichever it is. Frames of a device that has disconnected
// stay readable, and are sent.
package forward
